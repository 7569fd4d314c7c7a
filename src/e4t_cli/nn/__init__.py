"""The paper in torch: weight offsets, the encoder, U-Net features (sections 3.1 and 3.2)."""
