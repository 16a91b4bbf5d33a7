# SPDX-License-Identifier: Apache-2.0
"""A layer as an ONNX graph, run by ONNX Runtime."""

import os
import tempfile

import numpy
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from . import blocks
from .layer import EPS, Absent


class Graph:
    """An ONNX graph in the making; nodes and constants are known by their names."""

    def __init__(self):
        self.nodes, self.constants, self.inputs, self.feeds = [], [], [], {}

    def constant(self, name, array):
        self.constants.append(numpy_helper.from_array(numpy.ascontiguousarray(array), name))
        return name

    def node(self, kind, *inputs, domain="", outputs=None, **attributes):
        outputs = outputs or [f"{kind}_{len(self.nodes)}"]
        self.nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def shape(self, *sizes):
        return self.constant(f"shape_{len(self.constants)}", numpy.array(sizes, numpy.int64))

    def given(self, name, array):
        kind = TensorProto.FLOAT if array.dtype == numpy.float32 else TensorProto.INT32
        self.inputs.append(helper.make_tensor_value_info(name, kind, array.shape))
        self.feeds[name] = array
        return name

    def model(self, outputs, opset=18):
        """The model for outputs, pairs of a name and sizes; what to feed it; the outputs."""
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in outputs]
        graph = helper.make_graph(self.nodes, "attention", self.inputs, infos, self.constants)
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9), self.feeds, outputs


class BlockGraph(Graph):
    """The operations of a row of blocks.json; `operator`: with the MultiHeadAttention operator of ONNX Runtime."""

    def __init__(self, block, operator):
        super().__init__()
        self.block, self.operator = block, operator

    def weight(self, name):
        return self.constant(name, self.block.weights[name])

    def linear(self, x, name):
        y = self.node("MatMul", x, self.constant(name + "_w", self.block.weights[name + "_w"].T))
        return self.add(y, self.weight(name + "_b")) if name + "_b" in self.block.weights else y

    def norm(self, x, name):
        if self.block.norm == "rms":
            return self.node("SimplifiedLayerNormalization", x, self.weight(name + "_w"), axis=-1, epsilon=blocks.EPS)
        return self.node("LayerNormalization", x, self.weight(name + "_w"), self.weight(name + "_b"), axis=-1, epsilon=blocks.EPS)

    def gate(self, x, name):
        return self.node("Mul", x, self.node("Tanh", self.weight(name)))

    def activation(self, x):
        return self.node({"relu": "Relu", "gelu": "Gelu"}[self.block.activation], x)

    def add(self, x, y):
        return self.node("Add", x, y)

    def heads(self, x):
        if self.operator:
            return x
        return self.node("Transpose", self.node("Reshape", x, self.shape(0, 0, self.block.H, -1)), perm=[0, 2, 1, 3])

    def attend(self, q, k, v):
        scale = float(self.block.scale)
        if self.operator:
            return self.node("MultiHeadAttention", q, k, v, domain="com.microsoft", num_heads=self.block.H, scale=scale)
        scaled = self.node("Mul", q, self.constant(f"scale_{len(self.constants)}", numpy.float32(scale)))
        logits = self.node("MatMul", scaled, self.node("Transpose", k, perm=[0, 1, 3, 2]))
        mixed = self.node("MatMul", self.node("Softmax", logits, axis=-1), v)
        return self.node("Reshape", self.node("Transpose", mixed, perm=[0, 2, 1, 3]), self.shape(0, 0, -1))


def block_model(block, operator):
    if operator and block.kind == "linear":
        raise Absent("it has no attention")
    graph = BlockGraph(block, operator)
    inputs = [graph.given(f"input_{i}", array) for i, array in enumerate(block.inputs)]
    output = blocks.forward(block, graph, inputs)
    return graph.model([(output, [block.B, block.Lq, getattr(block, "Eo", block.Eq)])], opset=20)


def onnx_model(layer, wanted, operator):
    """The layer as an ONNX graph: of plain operations, or with the MultiHeadAttention operator of ONNX Runtime."""
    if isinstance(layer, blocks.Block):
        return block_model(layer, operator)
    graph = Graph()
    constant, node, shape, given = graph.constant, graph.node, graph.shape, graph.given

    def linear(x, name):
        weight = constant("w" + name, getattr(layer, "w" + name).T)
        return node("Add", node("MatMul", x, weight), constant("b" + name, getattr(layer, "b" + name)))

    def rms(x, weight, name):
        return node("SimplifiedLayerNormalization", x, constant(name, weight), axis=-1, epsilon=EPS)

    def norm_of(x, n, weight, name):
        """[B, L, n d] -> the same, with the norm."""
        if weight is None:
            return x
        if layer.norm == "across_heads":
            return rms(x, weight, name)
        split = rms(node("Reshape", x, shape(0, 0, n, -1)), weight, name)
        return node("Reshape", split, shape(0, 0, -1))

    def split(x, n):
        return node("Transpose", node("Reshape", x, shape(0, 0, n, -1)), perm=[0, 2, 1, 3])

    def for_all_heads(x):
        """[B, G, L, size] -> [B, H, L, size]"""
        if layer.G == layer.H:
            return x
        expanded = node("Expand", node("Unsqueeze", x, shape(2)), shape(1, 1, layer.H // layer.G, 1, 1))
        return node("Reshape", expanded, shape(0, layer.H, layer.Lk, -1))

    query = constant("query", layer.query) if layer.learned else given("query", layer.query)
    q = norm_of(linear(query, "q"), layer.H, layer.nq, "nq")
    if layer.timed == "attend":
        k_array, v_array = numpy_context(layer)  # [B, G, Lk, d]
        k, v = given("k", k_array), given("v", v_array)
    else:
        key = given("key", layer.key)
        value = key if layer.one_context else given("value", layer.value)
        k = norm_of(linear(key, "k"), layer.G, layer.nk, "nk")
        v = linear(value, "v")
    weights = None
    if operator:
        if wanted != "none":
            raise Absent("it returns no weights")
        if layer.G != layer.H:
            raise Absent("it has no groups")
        if layer.learned and layer.B > 1:
            q = node("Expand", q, shape(layer.B, 1, 1))
        mask = [given("keep", layer.keep.astype(numpy.int32))] if layer.keep is not None else []
        mixed = node("MultiHeadAttention", q, k, v, *([""] + mask if mask else []), domain="com.microsoft", num_heads=layer.H)
    else:
        if layer.timed != "attend":
            k, v = split(k, layer.G), split(v, layer.G)
        scaled = node("Mul", split(q, layer.H), constant("scale", numpy.float32(layer.d**-0.5)))
        logits = node("MatMul", scaled, node("Transpose", for_all_heads(k), perm=[0, 1, 3, 2]))
        if layer.bias is not None:
            logits = node("Add", logits, constant("bias", numpy.maximum(layer.bias, -1e30)))
        weights = node("Softmax", logits, axis=-1)
        mixed = node("Transpose", node("MatMul", weights, for_all_heads(v)), perm=[0, 2, 1, 3])
        mixed = node("Reshape", mixed, shape(0, 0, -1))
    outputs = [linear(mixed, "o")]
    if wanted != "none":
        outputs.append(node("ReduceMean", weights, shape(1), keepdims=0) if wanted == "mean" else weights)
    sizes = [
        [layer.B, layer.Lq, layer.Eo],
        [layer.B, layer.Lq, layer.Lk] if wanted == "mean" else [layer.B, layer.H, layer.Lq, layer.Lk],
    ]
    return graph.model(list(zip(outputs, sizes)))


def numpy_context(layer):
    """Projected k and v of a row without norms, [B, G, Lk, size]."""
    assert layer.norm == "-"
    return [
        numpy.ascontiguousarray((x @ w.T + b).reshape(layer.B, layer.Lk, layer.G, -1).transpose(0, 2, 1, 3))
        for x, w, b in ((layer.key, layer.wk, layer.bk), (layer.value, layer.wv, layer.bv))
    ]


def write_model(model, folder):
    """Large models keep their weights in a file beside them."""
    path = os.path.join(folder, "model.onnx")
    onnx.save_model(model, path, save_as_external_data=model.ByteSize() > 1 << 30, location="weights")
    return path


def candidates_onnxruntime(layer, wanted, threads):
    if layer.timed == "backward":
        raise Absent("it has no gradients")

    def make(operator):
        model, feeds, outputs = onnx_model(layer, wanted, operator)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        with tempfile.TemporaryDirectory() as folder:
            session = ort.InferenceSession(write_model(model, folder), options, ["CPUExecutionProvider"])
        binding = session.io_binding()
        kept = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        for name, value in kept.items():
            binding.bind_ortvalue_input(name, value)
        results = [ort.OrtValue.ortvalue_from_numpy(numpy.empty(size, numpy.float32)) for _, size in outputs]
        for (name, _), value in zip(outputs, results):
            binding.bind_ortvalue_output(name, value)

        def call():
            session.run_with_iobinding(binding)
            return results

        call.results = lambda: [x.numpy() for x in results]
        call.kept = kept
        return call

    return {"plain graph": lambda: make(False), "MultiHeadAttention": lambda: make(True)}
