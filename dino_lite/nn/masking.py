class BlockMasking:
    pass
