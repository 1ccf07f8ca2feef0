"""Comparing methods on an example: plan, run, measure, tables, charts; `study/results/` is the evidence."""
