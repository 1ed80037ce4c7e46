"""`POST /predict`: images in, labels and probabilities out."""
