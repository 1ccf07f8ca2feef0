"""One folder an example: its data, trainings, weights, judge, routers and README."""
