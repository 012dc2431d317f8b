"""Views: what a method sees of an image. A policy as numbers, one stateless sampler, two executors that agree."""
