"""The HTTP server: uvicorn's protocol on our own listening socket, running a WSGI application. Independent of Flask."""
