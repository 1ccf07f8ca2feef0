"""All methods compared on the digits: plan, run, measure, tables, charts; results/ is the evidence."""
