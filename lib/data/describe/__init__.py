"""Dense texts: what a multimodal model says of each image, written line by line."""
