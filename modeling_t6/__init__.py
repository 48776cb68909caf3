"""T6 for Transformers. Importing this package registers its classes with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .cache_t6 import T6Cache
from .configuration_t6 import T6Config
from .modeling_t6 import (
    T6ForCausalLM,
    T6ForQuestionAnswering,
    T6ForSequenceClassification,
    T6ForTokenClassification,
    T6Model,
    T6PreTrainedModel,
)


AutoConfig.register("t6", T6Config)
T6Config.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, T6Model),
    (AutoModelForCausalLM, T6ForCausalLM),
    (AutoModelForQuestionAnswering, T6ForQuestionAnswering),
    (AutoModelForSequenceClassification, T6ForSequenceClassification),
    (AutoModelForTokenClassification, T6ForTokenClassification),
):
    auto_class.register(T6Config, model_class)
    # `save_pretrained` then writes these files, and `auto_map`, beside the weights.
    model_class.register_for_auto_class(auto_class.__name__)


__all__ = [
    "T6Cache",
    "T6Config",
    "T6ForCausalLM",
    "T6ForQuestionAnswering",
    "T6ForSequenceClassification",
    "T6ForTokenClassification",
    "T6Model",
    "T6PreTrainedModel",
]
