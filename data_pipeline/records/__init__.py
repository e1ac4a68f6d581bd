"""Records of images and captions, and the shards that store them."""
