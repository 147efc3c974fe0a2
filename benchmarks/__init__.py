"""Each benchmark runs Vitrail and its peers in one run, alternating, and prints ratios with their spread."""
