"""The paper's mathematics, in torch alone: read these five files beside section 3.

- `image_tower`: the hierarchy of [CLS] tokens of the concept's picture.
- `unet_features`: what the U-Net's own encoder sees in z_t, the iterative refinement.
- `word_embedding_encoder`: E(I_c), the offset of the word embedding in eq. 1.
- `weight_offsets`: W = W₀ · (1 + ΔW), eq. 3, on every attention projection.
- `losses`: eq. 2 and eq. 4, whose sum is eq. 5.

And beside the paper: `low_rank` and `branching`, a concept's change of the weights in few numbers.
"""
