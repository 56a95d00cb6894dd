"""flora_jax: vision transformers made smaller and faster, by FLORA and ViT-Slim.

What it offers is listed in `__init__.pyi`, and imported when it is used first: JAX takes seconds.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
