"""Our own method, trained on the error of the final image: search, importance, trajectory errors, rounds."""
