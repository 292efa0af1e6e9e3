"""Passes over the model: from the frontend's normal form to kernels and a memory plan; `pipeline` lists them."""
