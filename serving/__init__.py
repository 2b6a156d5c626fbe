"""The lookup table and its REST service; imports neither Beam nor TensorFlow."""
