"""Programs over the service, never over the engine: a sandbox that asks the model, and work made of many calls."""
