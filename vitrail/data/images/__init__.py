"""From the bytes of an image file to the model's input; knows no dataset."""
