"""Every op in plain PyTorch: readable, any device, float64-capable. The oracle of the tests and a backend of its
own."""
