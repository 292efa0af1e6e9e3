"""Post-training quantisation: a float32 model and some samples in, the same model with 8-bit layers out."""
