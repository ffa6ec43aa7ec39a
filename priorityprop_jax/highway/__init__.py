"""Highway backpropagation over depth."""
