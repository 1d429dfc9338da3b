"""MaxDraft trains draft heads for speculative decoding, in JAX."""

import logging

# transformers is here for its tokenizers; that its models would need PyTorch concerns nobody.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch" not in record.getMessage())
