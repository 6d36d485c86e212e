"""What TensorRT's ONNX parser takes, and whether a graph keeps to it. No TensorRT is needed to know.

The table is the parser's own (onnx-tensorrt, docs/operators.md) of TensorRT 10.15, for opsets 9 to 24, without the
types that these graphs never have (BF16, INT8, FP8, FP4)."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import TensorProto, shape_inference

OPSETS = range(9, 25)

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16})
_NUMBERS = _FLOATS | {TensorProto.INT32, TensorProto.INT64}
_ALL = _NUMBERS | {TensorProto.BOOL}

_TABLE: dict[frozenset, str] = {
    _FLOATS: """
        Acos Acosh Asin Asinh Atan Atanh Attention AveragePool BatchNormalization BlackmanWindow Ceil Celu Clip Conv
        ConvTranspose Cos Cosh CumSum DeformConv Dropout Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool
        GlobalLpPool GlobalMaxPool GridSample GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax
        InstanceNormalization IsInf LRN LSTM LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul
        MaxPool MeanVarianceNormalization Mish NonMaxSuppression NonZero PRelu QuantizeLinear RMSNormalization RNN
        RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal Resize RoiAlign RotaryEmbedding Round
        Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample""",
    _NUMBERS: """
        Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min Mod
        Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
        ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK""",
    _ALL: """
        Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot
        Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where""",
    _ALL | {TensorProto.UINT8}: "Cast CastLike",
    frozenset({TensorProto.BOOL}): "And Not Or Xor",
    frozenset({TensorProto.FLOAT}): "STFT",
}
OPERATORS = {name: types for types, names in _TABLE.items() for name in names.split()}


def problems(model: onnx.ModelProto) -> Iterator[str]:
    """What the parser would not take, a line each: operators, types, opset, attributes where the table restricts them.

    UINT8 is taken as an input of the whole graph only, and only a Cast reads it."""
    for opset in model.opset_import:
        if opset.domain not in ("", "ai.onnx") or opset.version not in OPSETS:
            yield f"opset {opset.version} of {opset.domain or 'ai.onnx'}"
    graph = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {v.name: v.type.tensor_type.elem_type for v in values} | {i.name: i.data_type for i in graph.initializer}
    constants = {i.name for i in graph.initializer}
    for node in graph.node:
        if node.op_type not in OPERATORS:
            yield f"{node.op_type} {node.name}"
            continue
        inputs = node.input[:1] if node.op_type == "Resize" else node.input  # its others are sizes or scales
        for name in [n for n in (*inputs, *node.output) if n]:
            if types[name] not in OPERATORS[node.op_type]:
                yield f"{node.op_type} {node.name} of {TensorProto.DataType.Name(types[name])}"
        if node.op_type.startswith("Reduce") and len(node.input) > 1 and node.input[1] not in constants:
            yield f"{node.op_type} {node.name} with axes that are computed"
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "MaxPool" and (len(node.output) > 1 or set(attributes.get("dilations", [1])) != {1}):
            yield f"MaxPool {node.name} with indices or dilations"
        if node.op_type == "LayerNormalization" and len([n for n in node.output if n]) > 1:
            yield f"LayerNormalization {node.name} with more than one output"
        if node.op_type == "Resize" and (attributes.get("mode", b"nearest") not in (b"nearest", b"linear")):
            yield f"Resize {node.name} of mode {attributes['mode'].decode()}"
