"""`/openapi.json`, the description of all routes (OpenAPI 3.1), and `/docs`, the same as a page."""
