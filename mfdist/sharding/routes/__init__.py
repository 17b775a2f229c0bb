"""Routes: what travels in a lookup and in its gradient, one module for each kind of sharding."""
