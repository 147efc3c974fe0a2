"""Write models for other software: each format writes all that the model file holds, or says why it cannot."""
