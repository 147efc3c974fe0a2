"""HTML pages and images that need no network: the report of a run, the findings of a check, the contact sheet."""
