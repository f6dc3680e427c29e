"""The ordered-momentum parameter server: a pure core and the shells that drive it."""
