"""The base text-to-image model, the weights of a domain, and the model that tuning returns."""
