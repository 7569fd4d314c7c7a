"""Domain pre-training (section 3.3): encoder and weight offsets learn, the base is frozen."""
