"""How attention is computed, and the choice among the ways."""
