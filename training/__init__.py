"""Train image classifiers in Keras and export the best checkpoint as a SavedModel."""
