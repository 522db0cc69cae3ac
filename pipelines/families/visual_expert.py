"""The network that CogVLM v1 and CogVLM2 share: a language model whose layers have a second set of weights for image tokens."""

from boxcar.pipelines.families.family import Network

NETWORK = Network(
    model_type="cogvlm",
    part_names={
        "merger": r"model\.vision\.(linear_proj|conv|boi|eoi)\b",
        "vision": r"model\.vision\.(?!(linear_proj|conv|boi|eoi)\b)",
        "language": r"(model\.(embed_tokens|layers|norm)|lm_head)\.",
    },
    lora_targets={
        "language": r"model\.layers\.\d+\.(self_attn\.(vision|language)_expert_(query_key_value|dense)"
        r"|mlp\.(vision|language)_mlp\.(gate|up|down)_proj)",
        "vision": r"model\.vision\.transformer\.layers\.\d+\.(attention\.(query_key_value|dense)|mlp\.fc[12])",
        "merger": r"model\.vision\.linear_proj\.(linear_proj|gate_proj|dense_h_to_4h|dense_4h_to_h)",
    },
    vision_module="model.vision",
    decoder_layers="model.layers",
    positions="shared_image",
    architecture="visual_expert",
    image_input="squares",
    experts={"image": r"\.vision_(expert|mlp)", "text": r"\.language_(expert|mlp)"},
)
