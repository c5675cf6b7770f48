"""Pictures of what a network sees and makes of images: `python -m dinov2_jax.visualize`."""
