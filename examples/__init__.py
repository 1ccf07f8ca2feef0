"""One folder for each data set: its data, trainings, weights, judge, routers and README.

`common.registry` finds every folder whose `__init__.py` holds an EXAMPLE.
"""
