"""The configuration that vLLM gets of a folder. Imported by the plug-in alone, inside of vLLM.

transformers keeps reading folders as before, in the same process, too: only vLLM's own reader of config.json changes.
"""

from __future__ import annotations

from typing import Any

from slimrank.serving.vllm import served_config

try:
    from vllm.transformers_utils.config import HFConfigParser
except ImportError:  # so that every module of slimrank imports everywhere
    HFConfigParser = object


class SlimRankConfigParser(HFConfigParser):
    """vLLM's reader of config.json, which hands over folders of slimrank as models of their native architecture."""

    def parse(self, *where: Any, **options: Any) -> tuple[dict[str, Any], Any]:
        """Return what is in config.json, and the configuration.

        Raises:
            ModelError: vLLM would load the folder wrong.
        """
        content, config = super().parse(*where, **options)
        if not isinstance(getattr(config, "slimrank", None), dict):
            return content, config
        config = served_config(config)
        # vLLM prefers what the file says of quantisation.
        return {**content, "quantization_config": getattr(config, "quantization_config")}, config  # noqa: B009
