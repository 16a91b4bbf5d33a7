# SPDX-License-Identifier: Apache-2.0
"""A layer in OpenVINO: its ONNX graph, and a model of OpenVINO's own operations."""

import tempfile

import numpy
import openvino as ov
from openvino import opset13 as ops

from . import blocks
from .layer import Absent
from .with_onnx import numpy_context, onnx_model, write_model


class BlockOps:
    """The operations of a row of blocks.json, in OpenVINO's own."""

    def __init__(self, block):
        self.block = block

    def weight(self, name):
        return ops.constant(numpy.ascontiguousarray(self.block.weights[name]))

    def linear(self, x, name):
        y = ops.matmul(x, self.weight(name + "_w"), False, True)
        return ops.add(y, self.weight(name + "_b")) if name + "_b" in self.block.weights else y

    def norm(self, x, name):
        last, eps = ops.constant(numpy.array([-1])), numpy.float32(blocks.EPS)
        if self.block.norm == "rms":
            squares = ops.reduce_mean(ops.power(x, numpy.float32(2)), last, True)
            normal = ops.multiply(x, ops.divide(numpy.float32(1), ops.sqrt(ops.add(squares, eps))))
            return ops.multiply(normal, self.weight(name + "_w"))
        normal = ops.mvn(x, last, True, blocks.EPS, "INSIDE_SQRT")
        return ops.add(ops.multiply(normal, self.weight(name + "_w")), self.weight(name + "_b"))

    def gate(self, x, name):
        return ops.multiply(x, ops.tanh(self.weight(name)))

    def activation(self, x):
        return ops.relu(x) if self.block.activation == "relu" else ops.gelu(x, "erf")

    def add(self, x, y):
        return ops.add(x, y)

    def heads(self, x):
        sizes = ops.constant(numpy.array([0, 0, self.block.H, -1]))
        return ops.transpose(ops.reshape(x, sizes, True), ops.constant(numpy.array([0, 2, 1, 3])))

    def attend(self, q, k, v):
        factor = self.block.scale * self.block.d**0.5  # the operation divides by the square root
        q = q if factor == 1 else ops.multiply(q, numpy.float32(factor))
        mixed = ops.transpose(ops.scaled_dot_product_attention(q, k, v), ops.constant(numpy.array([0, 2, 1, 3])))
        return ops.reshape(mixed, ops.constant(numpy.array([0, 0, -1])), True)


def block_model(block):
    if block.kind == "linear":
        raise Absent("it has no attention")
    inputs = [ops.parameter(array.shape, numpy.float32) for array in block.inputs]
    return ov.Model([blocks.forward(block, BlockOps(block), inputs)], inputs), block.inputs


def candidates_openvino(layer, wanted, threads):
    if layer.timed == "backward":
        raise Absent("it has no gradients")

    def sdpa_model():
        if wanted != "none":
            raise Absent("it returns no weights")
        if layer.G != layer.H or layer.norm != "-":
            raise Absent("left to the plain graph")
        constant = lambda array: ops.constant(numpy.ascontiguousarray(array))
        ints = lambda *sizes: ops.constant(numpy.array(sizes, numpy.int64))
        parameters, feeds = [], []

        def given(array):
            parameters.append(ops.parameter(array.shape, numpy.float32))
            feeds.append(array)
            return parameters[-1]

        linear = lambda x, name: ops.add(
            ops.matmul(x, constant(getattr(layer, "w" + name)), False, True), constant(getattr(layer, "b" + name))
        )
        split = lambda x, n: ops.transpose(ops.reshape(x, ints(0, 0, n, -1), True), ints(0, 2, 1, 3))
        q = split(linear(constant(layer.query) if layer.learned else given(layer.query), "q"), layer.H)
        if layer.learned and layer.B > 1:
            q = ops.broadcast(q, ints(layer.B, layer.H, layer.Lq, layer.d))
        if layer.timed == "attend":
            k, v = (given(x) for x in numpy_context(layer))
        else:
            key = given(layer.key)
            value = key if layer.one_context else given(layer.value)
            k, v = split(linear(key, "k"), layer.G), split(linear(value, "v"), layer.G)
        mask = [constant(numpy.maximum(layer.bias, -1e30))] if layer.bias is not None else []
        mixed = ops.scaled_dot_product_attention(q, k, v, *mask)
        merged = ops.reshape(ops.transpose(mixed, ints(0, 2, 1, 3)), ints(0, 0, -1), True)
        return ov.Model([linear(merged, "o")], parameters), feeds

    def make(fused):
        core = ov.Core()
        with tempfile.TemporaryDirectory() as folder:
            if fused:
                model, feeds = block_model(layer) if isinstance(layer, blocks.Block) else sdpa_model()
            else:
                graph, named, _ = onnx_model(layer, wanted, False)
                model = core.read_model(write_model(graph, folder))
                feeds = [named[x.any_name] for x in model.inputs]
            compiled = core.compile_model(
                model,
                "CPU",
                {
                    "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_NUM_THREADS": threads,
                    "NUM_STREAMS": 1,
                    "INFERENCE_PRECISION_HINT": "f32",
                    "EXECUTION_MODE_HINT": "ACCURACY",
                },
            )
        request = compiled.create_infer_request()
        for i, array in enumerate(feeds):
            request.set_input_tensor(i, ov.Tensor(array, shared_memory=True))
        results = [ov.Tensor(numpy.zeros(list(x.shape), numpy.float32), shared_memory=True) for x in compiled.outputs]
        for i, tensor in enumerate(results):
            request.set_output_tensor(i, tensor)
        call = lambda: request.infer(share_inputs=True, share_outputs=True)
        call.results = lambda: [x.data for x in results]
        call.kept = feeds
        return call

    return {"plain graph": lambda: make(False), "ScaledDotProductAttention": lambda: make(True)}
