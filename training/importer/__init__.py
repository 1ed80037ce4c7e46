"""Import of Keras classifiers: reads a model, infers how it takes images, and publishes it like a trained run."""
