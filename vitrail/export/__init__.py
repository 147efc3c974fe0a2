"""Models for other software: every format writes what the model file holds, or says why it cannot."""
