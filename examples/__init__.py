"""One folder a data set: data, trainings, weights, judge, routers, README. `common.registry` lists them."""
