"""One offline HTML page per run: how good the model is, where it errs, and how it came about."""
