"""The HTTP dialects: each translates requests to a predictor's signature call and back."""
