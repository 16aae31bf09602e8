EXERCISES["4.5"] = Exercise(
    reference="BCA",
    mistakes={
        "right for mistake 1; which of the other two has clear outlines, and which the right "
        "colours in a blur?": "BAC",
    },
    otherwise="one sheet has the right scenes in wrong colours: which mistake leaves the U-Net as "
    "it is? And see what 4.4 says of too wide and too narrow latents",
    also_wrong={"leaves the U-Net": ["ABC", "CAB"]},
)
