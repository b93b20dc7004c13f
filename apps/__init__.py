"""Programs built on seguncert: the training recipe, the sample pictures, the page."""
