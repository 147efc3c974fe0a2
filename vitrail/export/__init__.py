"""Models for other libraries: written in their form, with their preprocessing and labels."""
