"""One file a group of routes; each has ``router(service) -> APIRouter``."""
