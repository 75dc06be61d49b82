"""The shapes of requests and answers; one file an endpoint."""
