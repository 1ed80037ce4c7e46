"""Export of a trained model as a SavedModel: writing, verifying, publishing."""
