"""The bundled models, one folder each: config.json, model.safetensors, card.json."""
