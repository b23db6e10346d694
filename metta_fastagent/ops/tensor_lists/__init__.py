"""Operations on lists of tensors in one launch: weight clipping and the L2-init loss."""
