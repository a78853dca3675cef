"""Lines of a names table for the layers that nearly every checkpoint is made of: `[*norm("ln", "ln_q"), *linear(...)]`."""

from __future__ import annotations

from tcjax.interop.names import Name


def linear(ours: str, theirs: str, *, bias: bool = True) -> list[Name]:
    """nnx.Linear <-> nn.Linear."""
    return [Name(f"{ours}/kernel", f"{theirs}.weight", "transpose"), *_bias(ours, theirs, bias)]


def conv(ours: str, theirs: str, *, bias: bool = True) -> list[Name]:
    """tcjax.nn.conv.Conv <-> nn.Conv2d, depthwise ones too."""
    return [Name(f"{ours}/kernel", f"{theirs}.weight", "conv"), *_bias(ours, theirs, bias)]


def conv1x1(ours: str, theirs: str, *, bias: bool = True) -> list[Name]:
    """nnx.Linear <-> nn.Conv2d with a 1 x 1 kernel."""
    return [Name(f"{ours}/kernel", f"{theirs}.weight", "conv1x1"), *_bias(ours, theirs, bias)]


def norm(ours: str, theirs: str, *, bias: bool = True) -> list[Name]:
    """LayerNorm, or RMSNorm without bias."""
    return [Name(f"{ours}/scale", f"{theirs}.weight", "same"), *_bias(ours, theirs, bias)]


def attention(ours: str, theirs: str) -> list[Name]:
    """tcjax.nn.mha.MultiheadAttention <-> nn.MultiheadAttention."""
    return [
        Name(f"{ours}/in_proj/kernel", f"{theirs}.in_proj_weight", "transpose"),
        Name(f"{ours}/in_proj/bias", f"{theirs}.in_proj_bias", "same"),
        *linear(f"{ours}/out_proj", f"{theirs}.out_proj"),
    ]


def gated_mlp(ours: str, theirs: str) -> list[Name]:
    """tcjax.nn.perceiver.GatedMlp <-> the gate_proj, up_proj and down_proj of Llama, Idefics2 and their kin."""
    return [
        line
        for part in ("gate", "up", "down")
        for line in linear(f"{ours}/{part}", f"{theirs}.{part}_proj", bias=False)
    ]


def perceiver_layer(ours: str, theirs: str) -> list[Name]:
    """tcjax.nn.perceiver.PerceiverLayer <-> Idefics2PerceiverLayer."""
    norms = {"latents": "input_latents_norm", "context": "input_context_norm", "mlp": "post_attention_layernorm"}
    kernels = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    table = gated_mlp(f"{ours}/mlp", f"{theirs}.mlp")
    for name, published in norms.items():
        table += norm(f"{ours}/norm_{name}", f"{theirs}.{published}", bias=False)
    for name, published in kernels.items():
        table += linear(f"{ours}/{name}", f"{theirs}.self_attn.{published}", bias=False)
    return table


def mlp(ours: str, theirs: str, depth: int) -> list[Name]:
    """tcjax.nn.mlp.Mlp <-> nn.Sequential whose even members are linear; `theirs` is "" or ends in a dot."""
    return [line for k in range(depth) for line in linear(f"{ours}/linears/{k}", f"{theirs}{2 * k}")]


def _bias(ours: str, theirs: str, has: bool) -> list[Name]:
    return [Name(f"{ours}/bias", f"{theirs}.bias", "same")] if has else []
