// SPDX-License-Identifier: Apache-2.0
#include "cli/cli.h"

#include <torch/torch.h>
#include <xattn/cross_attention.h>
#include <xattn/load.h>
#include <xattn/plan.h>
#include <xattn/safetensors.h>
#include <xattn/version.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>

#include "kernels/kernels.h"
#include "pickle_writer.h"
#include "plan/runs_on.h"
#include "run_program.h"
#include "test_util.h"

namespace xattn {
namespace {

using nlohmann::json;
using test::data_path;

class CliTest : public testing::Test {
 protected:
  // Runs the program in the temporary directory.
  test::ProgramResult xattn(const std::string& arguments) const {
    return test::run_here(cli::run, "xattn " + arguments, dir.path());
  }

  // The one line on standard error, without the program's name, of a run that ends with this status.
  std::string error(int status, const std::string& arguments) const {
    const auto result = xattn(arguments);
    EXPECT_EQ(result.status, status) << result.err;
    EXPECT_EQ(result.out, "");
    EXPECT_EQ(std::ranges::count(result.err, '\n'), 1) << result.err;
    EXPECT_TRUE(result.err.starts_with("xattn: ") && result.err.ends_with("\n")) << result.err;
    return result.err.size() < 8 ? "" : result.err.substr(7, result.err.size() - 8);
  }

  // Runs `attention` by itself and, with these arguments, by the program; expects the same results.
  void expect_same(CrossAttention attention, const NamedTensors& inputs, const Mask& mask, const std::string& arguments) {
    save_safetensors(dir.file("weights"), *attention);
    save_safetensors(dir.file("in"), inputs);
    const auto result = xattn("run weights --inputs in --output out --device cpu " + arguments);
    ASSERT_EQ(result.status, 0) << result.err;
    EXPECT_EQ(result.out + result.err, "");

    const auto& key = inputs.contains("key") ? inputs.at("key") : inputs.at("context");
    const auto& value = inputs.contains("value") ? inputs.at("value") : inputs.at("context");
    const torch::NoGradGuard no_grad;
    const auto [output, weights] = attention->forward(inputs.at("query"), key, value, mask);
    auto results = load_tensors(dir.file("out"));
    EXPECT_EQ(results.size(), weights.defined() ? 2U : 1U);
    EXPECT_TRUE(torch::equal(results["output"], output));
    if (weights.defined()) {
      EXPECT_TRUE(torch::equal(results["weights"], weights));
    }
  }

  const test::TempDir dir;
  const torch::Tensor query = torch::rand({2, 3, 4});
  const torch::Tensor key = torch::rand({2, 5, 6});
  const torch::Tensor value = torch::rand({2, 5, 6});
};

// ---- run --------------------------------------------------------------------------------------------------------------------

TEST_F(CliTest, RunEqualsTheModule) {
  expect_same(CrossAttention(4, 6, 6, 8), {{"query", query}, {"key", key}, {"value", value}}, {}, "--weights mean");
}

TEST_F(CliTest, RunWritesWeightsOnlyIfAsked) {
  const auto options = CrossAttentionOptions(4, 6, 6, 8).attention_weights(AttentionWeights::none);
  expect_same(CrossAttention(options), {{"query", query}, {"key", key}, {"value", value}}, {}, "");
}

TEST_F(CliTest, RunTakesHeadsAndWritesWeightsOfEach) {
  const auto options = CrossAttentionOptions(4, 6, 6, 8).num_heads(4).attention_weights(AttentionWeights::per_head);
  expect_same(CrossAttention(options), {{"query", query}, {"key", key}, {"value", value}}, {}, "--heads 4 --weights per-head");
}

TEST_F(CliTest, RunTakesOneContextForKeyAndValue) {
  expect_same(CrossAttention(4, 6, 6, 8), {{"query", query}, {"context", key}}, {}, "--weights mean");
}

TEST_F(CliTest, RunTakesMasksAndBias) {
  const auto padding = torch::tensor({{1, 1, 0, 0, 0}, {1, 0, 1, 1, 1}}).to(torch::kBool);
  const auto dense = torch::rand({2, 1, 3, 5}) > 0.3;
  const auto bias = torch::randn({2, 1, 3, 5});
  const CrossAttention attention(4, 6, 6, 8);
  expect_same(attention, {{"query", query}, {"context", key}, {"mask", padding}}, Mask::key_padding(padding), "--weights mean");
  expect_same(attention, {{"query", query}, {"context", key}, {"mask", dense}}, Mask::dense(dense), "--weights mean");
  expect_same(attention, {{"query", query}, {"context", key}, {"mask", padding}, {"bias", bias}},
              Mask::key_padding(padding) & Mask::bias(bias), "--weights mean");
}

TEST_F(CliTest, RunWorksInTheTypeOfTheQuery) {
  CrossAttention attention(4, 6, 6, 8);
  attention->to(torch::kDouble);
  attention->reset_parameters();  // to numbers that float32 would round
  expect_same(attention, {{"query", query.to(torch::kDouble)}, {"context", key.to(torch::kDouble)}}, {}, "--weights mean");
  save_safetensors(dir.file("in"), NamedTensors{{"query", query}, {"context", key}});
  EXPECT_EQ(xattn("run weights --inputs in --output out --device cpu --threads 1").status, 0);
  EXPECT_EQ(load_tensors(dir.file("out")).at("output").scalar_type(), torch::kFloat);
}

TEST_F(CliTest, RunTakesTheOnlyLayerOfALargerModel) {
  save_safetensors(dir.file("in"), NamedTensors{{"query", torch::rand({2, 3, 8})}, {"context", torch::rand({2, 5, 12})}});
  for (const std::string prefix : {"", "--prefix fusion", "--prefix fusion."}) {
    const auto result = xattn("run " + data_path("reference_in_model.pt") + " --inputs in --output out --device cpu " + prefix);
    EXPECT_EQ(result.status, 0) << result.err;
  }
}

TEST_F(CliTest, RunTakesAnIpAdapterByThePlaceOfTheLayerOrByName) {
  const auto base = data_path("layouts/unet_whole.safetensors"), adapter = data_path("layouts/ip_adapter_up.safetensors");
  const auto fixture = open_checkpoint(data_path("layouts/ip_adapter_up.expect.safetensors"));
  NamedTensors inputs;
  for (const auto* name : {"query", "context", "ip_context"}) inputs[name] = fixture.tensor(name);
  save_safetensors(dir.file("in"), inputs);
  const auto command = "run " + base + " --prefix " + fixture.metadata().at("base_prefix") + " --heads 2 --device cpu " +
                       "--inputs in --output out --ip-scale 0.6 --ip-adapter " + adapter;
  for (const std::string place : {"", " --ip-prefix ip_adapter.5", " --ip-prefix ip_adapter.5."}) {
    const auto result = xattn(command + place);
    ASSERT_EQ(result.status, 0) << result.err;
    EXPECT_TRUE(load_tensors(dir.file("out")).at("output").allclose(fixture.tensor("output"), 1e-5, 1e-6)) << place;
  }
  EXPECT_EQ(error(1, command + " --ip-prefix ip_adapter.6"),
            "[ip_adapter] " + adapter +
                ": prefix must be one of \"ip_adapter.1.\", \"ip_adapter.3.\", \"ip_adapter.5.\", "
                "\"ip_adapter.7.\", but is \"ip_adapter.6\"");
  inputs.erase("ip_context");
  save_safetensors(dir.file("in"), inputs);
  EXPECT_EQ(error(1, command), "[inputs] in: must hold ip_context for the IP-Adapter");
}

TEST_F(CliTest, RunListsTheLayersWhereThereAreSeveral) {
  NamedTensors tensors;
  const CrossAttention attention(4, 6, 6, 8);
  for (const auto& item : attention->named_parameters()) {
    tensors["a." + item.key()] = item.value();
    tensors["b." + item.key()] = item.value();
  }
  save_safetensors(dir.file("two"), tensors);
  save_safetensors(dir.file("in"), NamedTensors{{"query", query}, {"context", key}});
  EXPECT_EQ(error(1, "run two --inputs in --output out"),
            "[load] two: prefix must be one of \"a.\", \"b.\", but was not given");
  EXPECT_EQ(error(1, "run two --inputs in --output out --prefix c"),
            "[load] two: prefix must be one of \"a.\", \"b.\", but is \"c\"");
  EXPECT_EQ(xattn("run two --inputs in --output out --prefix b. --device cpu").status, 0);
}

TEST_F(CliTest, RunRefusesFilesWithoutALayer) {
  save_safetensors(dir.file("none"), NamedTensors{{"weight", query}});
  EXPECT_EQ(error(1, "run none --inputs in --output out"),
            "[load] none: must hold an attention layer in a layout that is known, but holds none");
}

TEST_F(CliTest, RunRefusesHeadsThatDoNotDivide) {
  save_safetensors(dir.file("weights"), *CrossAttention(4, 6, 6, 8));
  save_safetensors(dir.file("in"), NamedTensors{{"query", query}, {"context", key}});
  EXPECT_EQ(error(1, "run weights --inputs in --output out --heads 3"),
            "[load] weights: the number of heads of \"\" must be one of 1, 2, 4, 8, but is 3");
}

TEST_F(CliTest, RunRefusesInputsThatAreNotItsOwn) {
  save_safetensors(dir.file("weights"), *CrossAttention(4, 6, 6, 8));
  const auto refusal = [&](const NamedTensors& inputs) {
    save_safetensors(dir.file("in"), inputs);
    const auto message = error(1, "run weights --inputs in --output out --device cpu");
    EXPECT_FALSE(std::filesystem::exists(dir.file("out")));
    return message;
  };
  const std::string incomplete = "[inputs] in: must hold query, and either key and value, or context";
  EXPECT_EQ(refusal({{"query", query}}), incomplete);
  EXPECT_EQ(refusal({{"query", query}, {"key", key}}), incomplete);
  EXPECT_EQ(refusal({{"query", query}, {"key", key}, {"context", key}}), incomplete);
  EXPECT_EQ(refusal({{"context", key}}), incomplete);
  EXPECT_EQ(refusal({{"query", query}, {"context", key}, {"masks", key}}),
            "[inputs] in: may hold bias, context, ip_context, key, mask, query, value only, but holds \"masks\"");
  EXPECT_EQ(refusal({{"query", query.to(torch::kLong)}, {"context", key}}),
            "[inputs] in: query must have a floating point type");
  EXPECT_EQ(refusal({{"query", query}, {"context", key}, {"mask", torch::ones({5}, torch::kBool)}}),
            "[inputs] in: mask must have shape [B|1, Lk] or [B|1, H|1, Lq|1, Lk], but has [5]");
  EXPECT_TRUE(refusal({{"query", query}, {"context", query}}).starts_with("[cross_attention] key must have shape [B, Lk, 6]"));
}

TEST_F(CliTest, RunRefusesToOverwriteItsInputs) {
  save_safetensors(dir.file("weights"), *CrossAttention(4, 6, 6, 8));
  save_safetensors(dir.file("in"), NamedTensors{{"query", query}, {"context", key}});
  std::filesystem::create_hard_link(dir.file("in"), dir.file("link"));
  EXPECT_EQ(error(2, "run weights --inputs in --output weights"), "output: must not be an input, but is weights");
  EXPECT_EQ(error(2, "run weights --inputs in --output ./in"), "output: must not be an input, but is in");
  EXPECT_EQ(error(2, "run weights --inputs in --output link"), "output: must not be an input, but is in");
  EXPECT_EQ(load_tensors(dir.file("weights")).size(), 8U);
}

TEST_F(CliTest, RunRefusesDevicesThatAreNotThere) {
  EXPECT_EQ(error(2, "run weights --inputs in --output out --device gpu"), "--device: 'gpu' is not cpu, cuda or cuda:N");
  const auto count = std::to_string(torch::cuda::device_count());
  EXPECT_EQ(error(1, "run weights --inputs in --output out --device cuda:77"),
            "there is no device cuda:77 here (" + count + " CUDA devices); try --device cpu");
}

TEST_F(CliTest, RunDefaultsToCudaWhereThereIsOne) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "no CUDA device";
  save_safetensors(dir.file("weights"), *CrossAttention(4, 6, 6, 8));
  save_safetensors(dir.file("in"), NamedTensors{{"query", query}, {"context", key}});
  EXPECT_EQ(xattn("run weights --inputs in --output by_default").status, 0);
  EXPECT_EQ(xattn("run weights --inputs in --output on_cuda --device cuda").status, 0);
  EXPECT_EQ(test::read_bytes(dir.file("by_default")), test::read_bytes(dir.file("on_cuda")));
}

// ---- inspect ----------------------------------------------------------------------------------------------------------------

TEST_F(CliTest, InspectPrintsDocumentedJson) {
  const CrossAttention attention(CrossAttentionOptions(4, 5, 6, 8).num_heads(4).kv_heads(2).qkv_bias(false));
  save_safetensors(dir.file("x"), *attention, {{"who", "me\n"}});
  const auto result = xattn("inspect x --json");
  ASSERT_EQ(result.status, 0) << result.err;
  const auto expected = json::parse(R"({
    "format": "safetensors",
    "metadata": {"num_heads": "4", "who": "me\n"},
    "tensors": [
      {"name": "key_linear.weight", "type": "float32", "shape": [4, 5]},
      {"name": "output_linear.bias", "type": "float32", "shape": [8]},
      {"name": "output_linear.weight", "type": "float32", "shape": [8, 8]},
      {"name": "query_linear.weight", "type": "float32", "shape": [8, 4]},
      {"name": "value_linear.weight", "type": "float32", "shape": [4, 6]}],
    "unreadable": [],
    "layers": [
      {"prefix": "", "layout": "reference", "kind": "cross", "num_heads": null, "dim_query": 4, "dim_key": 5, "dim_value": 6, "dim_output": 8,
       "inner_qk": 8, "inner_v": 8, "group": 2,
       "query_bias": false, "key_bias": false, "value_bias": false, "output_bias": true,
       "qk_norm": "none", "added_contexts": 0, "unexpected": [], "misshapen": [], "refused": ""}],
    "blocks": []})");
  EXPECT_EQ(json::parse(result.out), expected);
}

TEST_F(CliTest, InspectReadsTorchScript) {
  const auto result = xattn("inspect " + data_path("reference_in_model.pt") + " --json");
  ASSERT_EQ(result.status, 0) << result.err;
  const auto document = json::parse(result.out);
  EXPECT_EQ(document["format"], "torchscript");
  EXPECT_EQ(document["tensors"].size(), 11U);
  EXPECT_EQ(document["layers"].size(), 1U);
  EXPECT_EQ(document["layers"][0]["prefix"], "fusion.");
}

TEST_F(CliTest, InspectShowsTensorsThatAreNotReadAndConvertRefusesThem) {
  const auto path = data_path("files/objects.pt");
  const auto text = xattn("inspect " + path).out;
  EXPECT_NE(text.find("not read\n"
                      "  \"meta\": it is made by torch._utils._rebuild_meta_tensor_no_storage\n"
                      "  \"quantized\": it is made by torch._utils._rebuild_qtensor\n"),
            std::string::npos)
      << text;
  const auto unreadable = json::parse(xattn("inspect " + path + " --json").out)["unreadable"];
  ASSERT_EQ(unreadable.size(), 3U);
  EXPECT_EQ(unreadable[2], json({{"name", "sparse"}, {"reason", "it is made by torch._utils._rebuild_sparse_tensor"}}));
  EXPECT_EQ(
      error(1, "convert " + path + " y.safetensors"),
      "[checkpoint] " + path + ": tensor \"meta\" is not read: it is made by torch._utils._rebuild_meta_tensor_no_storage");
}

TEST_F(CliTest, InspectPrintsALineForEachTensor) {
  save_safetensors(dir.file("x"), NamedTensors{{"a", torch::ones({2, 3})}, {"red\x1b[31m", torch::ones({}, torch::kBFloat16)}});
  EXPECT_EQ(xattn("inspect x").out,
            "safetensors, 2 tensors\n"
            "  \"a\"              float32          [2, 3]\n"
            "  \"red\\u001b[31m\"  bfloat16         []\n"
            "no attention layer\n");
}

TEST_F(CliTest, InspectPrintsNoMoreThanItNeedsAndNothingThatDrivesTheTerminal) {
  const std::string hostile =
      "\xe2\x80\xae\xc2\x9b"
      "31m\x7f";
  NamedTensors tensors = {{hostile, torch::ones({1})}, {std::string(100'000, 'n'), torch::ones({1})}};
  for (int i = 0; i < 2'000; ++i) tensors["t" + std::to_string(i)] = torch::ones({1});
  save_safetensors(dir.file("x"), tensors, {{"text", std::string(100'000, 'm') + hostile}});
  const auto text = xattn("inspect x");
  ASSERT_EQ(text.status, 0) << text.err;
  EXPECT_LT(text.out.size(), 300'000U);
  EXPECT_NE(text.out.find(R"("\u202e\u009b31m\u007f" )"), std::string::npos);
  EXPECT_NE(text.out.find("nnn\" (100000 bytes)  float32          [1]\n"), std::string::npos);
  EXPECT_NE(text.out.find("mmm\" (100009 bytes)\n"), std::string::npos);

  const auto printed = xattn("inspect x --json").out;
  const auto document = json::parse(printed);
  EXPECT_EQ(document["tensors"].size(), 2'002U);
  EXPECT_EQ(document["metadata"]["text"], std::string(100'000, 'm') + hostile);
  EXPECT_EQ(document["tensors"].back()["name"], hostile);
  for (const std::string control : {"\xe2\x80\xae", "\xc2\x9b", "\x7f"}) EXPECT_EQ(printed.find(control), std::string::npos);
}

TEST_F(CliTest, InspectShowsNamesThatAreNoUtf8) {
  const auto tensor = test::pickle::text("a\xff") + test::pickle::two_zeros();
  test::write_bytes(dir.file("x.pt"), test::pickle::archive(test::pickle::dict(tensor)));
  const auto result = xattn("inspect x.pt");
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_NE(result.out.find("  \"a\xef\xbf\xbd\" "), std::string::npos) << result.out;
  EXPECT_EQ(json::parse(xattn("inspect x.pt --json").out)["tensors"][0]["name"], "a\xef\xbf\xbd");
}

TEST_F(CliTest, ErrorsAreShortWhateverTheFileHolds) {
  const auto order = std::string(10'000'000, '\x1b');
  test::write_bytes(dir.file("x.pt"),
                    test::pickle::archive(test::pickle::dict(test::pickle::text("a") + test::pickle::two_zeros()),
                                          {{"archive/byteorder", order}}));
  const auto message = error(1, "inspect x.pt");
  EXPECT_LT(message.size(), 3'000U);
  EXPECT_EQ(message.find('\x1b'), std::string::npos);
  EXPECT_TRUE(message.ends_with("(10000000 bytes)")) << message;
}

// A shell runs the program with its standard output elsewhere.
TEST_F(CliTest, OutputThatIsLostIsAFailure) {
  save_safetensors(dir.file("x"), NamedTensors{{"a", torch::ones({2})}});
  for (const std::string arguments : {"inspect x", "inspect x --json", "--help", "--version", "explain 1,1,1,1,8,8,8"}) {
    const auto reason = [&](const std::string& text) {  // the reason is lost if CLI11 has already flushed
      return arguments == "--version" ? std::string("\n") : ": " + text + "\n";
    };
    const auto full = test::run_process("sh -c '" XATTN_CLI_PATH " " + arguments + " > /dev/full'", dir);
    EXPECT_EQ(full.status, 1) << arguments;
    EXPECT_EQ(full.err, "xattn: standard output cannot be written" + reason("No space left on device")) << arguments;
    const auto closed = test::run_process("sh -c '" XATTN_CLI_PATH " " + arguments + " >&-'", dir);
    EXPECT_EQ(closed.status, 1) << arguments;
    EXPECT_EQ(closed.err, "xattn: standard output cannot be written" + reason("Bad file descriptor")) << arguments;
  }
}

TEST_F(CliTest, NothingIsPrintedIntoAFileWhereStandardOutputIsClosed) {
  save_safetensors(dir.file("x.safetensors"), NamedTensors{{"a", torch::ones({2})}});
  const auto result = test::run_process("sh -c '" XATTN_CLI_PATH " convert x.safetensors y.safetensors >&- 2>&-'", dir);
  EXPECT_EQ(result.status, 0);
  EXPECT_EQ(test::read_bytes(dir.file("y.safetensors")), test::read_bytes(dir.file("x.safetensors")));
}

TEST_F(CliTest, InspectRefusesBrokenFiles) {
  EXPECT_EQ(error(1, "inspect nothing"), "[file] nothing: cannot be opened: No such file or directory");
  test::write_bytes(dir.file("x"), "some text");
  EXPECT_TRUE(error(1, "inspect x").starts_with("[checkpoint] x: must be a safetensors file, "));
  const auto bytes = test::read_bytes(data_path("reference.pt"));
  test::write_bytes(dir.file("half"), bytes.substr(0, bytes.size() / 2));
  EXPECT_TRUE(error(1, "inspect half").starts_with("[zip] half: "));
}

TEST_F(CliTest, InspectTellsCrossFromSelfAndTheLayout) {
  const auto result = xattn("inspect " + data_path("layouts/whisper.safetensors") + " --json");
  ASSERT_EQ(result.status, 0) << result.err;
  std::map<std::string, std::string> kinds;
  const auto document = json::parse(result.out);
  for (const auto& layer : document["layers"]) {
    EXPECT_EQ(layer["layout"], "out_proj");
    kinds[layer["prefix"]] = layer["kind"];
  }
  EXPECT_EQ(kinds.at("model.decoder.layers.0.encoder_attn."), "cross");
  EXPECT_EQ(kinds.at("model.decoder.layers.0.self_attn."), "self");
}

TEST_F(CliTest, InspectListsTheBlocksAroundLayers) {
  const auto moonshine = data_path("layouts/moonshine.safetensors"), idefics = data_path("layouts/idefics.safetensors");
  EXPECT_EQ(json::parse(xattn("inspect " + moonshine + " --json").out)["blocks"], json::parse(R"([
      {"prefix": "model.decoder.layers.0.", "layout": "moonshine", "attention": "model.decoder.layers.0.encoder_attn.",
       "norm": "layer", "norm_bias": false, "gate": "none",
       "feed_forward": 16, "feed_forward_glu": true, "feed_forward_bias": true, "unexpected": [], "misshapen": []}])"));
  const auto text = xattn("inspect " + idefics).out;
  EXPECT_TRUE(
      text.ends_with("blocks around them\n"
                     "  prefix \"model.gated_cross_attn_layers.0.\", layout \"idefics\", attention "
                     "\"model.gated_cross_attn_layers.0.cross_attn.\", norm \"rms\", norm_bias false, gate \"scalar\", "
                     "feed_forward 24, feed_forward_glu true, feed_forward_bias false, unexpected [], misshapen []\n"))
      << text;
}

// ---- Names that a layout does not explain -----------------------------------------------------------------------------------

// The weights of a layer of 4 and 6 features, and a name beside them.
NamedTensors layer_and(const std::string& name, const torch::Tensor& tensor = torch::ones({1})) {
  NamedTensors tensors;
  const CrossAttention attention(4, 6, 6, 8);
  for (const auto& item : attention->named_parameters()) tensors["a." + item.key()] = item.value();
  tensors["a." + name] = tensor;
  return tensors;
}

TEST_F(CliTest, NamesThatTheLayoutDoesNotExplainAreListedAndRefused) {
  save_safetensors(dir.file("weights"), layer_and("query_linear.lora_A.default.weight"));
  save_safetensors(dir.file("in"), NamedTensors{{"query", query}, {"context", key}});
  const auto found = json::parse(xattn("inspect weights --json").out)["layers"][0];
  EXPECT_EQ(found["unexpected"], json({"query_linear.lora_A.default.weight"}));
  EXPECT_NE(xattn("inspect weights").out.find("unexpected [\"query_linear.lora_A.default.weight\"]"), std::string::npos);
  const std::string refusal =
      "layer \"a.\" must have only names that layout reference explains; unexpected: query_linear.lora_A.default.weight; "
      "low-rank "
      "weights must first be merged into the others in Python, by merge_and_unload of peft or fuse_lora of diffusers, and all "
      "saved "
      "again";
  EXPECT_EQ(error(1, "run weights --inputs in --output out --device cpu"), "[load] weights: " + refusal);
  EXPECT_FALSE(std::filesystem::exists(dir.file("out")));
  ASSERT_EQ(xattn("run weights --inputs in --output out --device cpu --allow-unexpected").status, 0);
  auto expected = load_tensors(dir.file("in"));
  expected["output"] = load_tensors(dir.file("out")).at("output");
  save_safetensors(dir.file("expected"), expected);
  EXPECT_EQ(error(1, "verify weights --expect expected --device cpu"), "[load] weights: " + refusal);
  EXPECT_EQ(xattn("verify weights --expect expected --device cpu --allow-unexpected").status, 0);

  auto refused = refusal;
  refused.replace(refused.find("reference"), 9, "mlx");
  EXPECT_EQ(error(1, "convert weights new.safetensors --to mlx"), "[convert] weights: " + refused);
  EXPECT_EQ(error(1, "convert weights new.safetensors --to reference"), "[convert] weights: " + refusal);
  EXPECT_FALSE(std::filesystem::exists(dir.file("new.safetensors")));
  ASSERT_EQ(xattn("convert weights new.safetensors --to mlx --allow-unexpected").status, 0);
  const auto converted = load_tensors(dir.file("new.safetensors"));
  EXPECT_TRUE(converted.contains("a.query_proj.weight") && converted.contains("a.query_linear.lora_A.default.weight"));
  EXPECT_EQ(xattn("convert weights new.safetensors").status, 0);  // the same names in another file
}

TEST_F(CliTest, TensorsOfOtherSizesAreListedAndRefused) {
  save_safetensors(dir.file("weights"), layer_and("key_linear.bias", torch::ones({7})));
  save_safetensors(dir.file("in"), NamedTensors{{"query", query}, {"context", key}});
  const std::string reason = "key_linear.bias must have shape [8], but has [7]";
  EXPECT_EQ(json::parse(xattn("inspect weights --json").out)["layers"][0]["misshapen"], json({reason}));
  EXPECT_EQ(error(1, "run weights --inputs in --output out --device cpu --allow-unexpected"),
            "[load] weights: layer \"a.\" does not fit together; misshapen: " + reason);
  EXPECT_EQ(error(1, "convert weights new.safetensors --to mlx"),
            "[convert] weights: layer \"a.\" does not fit together; misshapen: " + reason);
}

TEST_F(CliTest, LayersThatConfigJsonRulesOutAreListedAndRefused) {
  save_safetensors(dir.file("weights"), *CrossAttention(4, 6, 6, 8));
  std::ofstream(dir.file("config.json")) << R"({"attn_logit_softcapping": 30.0})";
  const auto reason = json::parse(xattn("inspect weights --json").out)["layers"][0]["refused"].get<std::string>();
  EXPECT_NE(reason.find(R"(caps logits softly, by "attn_logit_softcapping" of 30: not computed)"), std::string::npos) << reason;
  save_safetensors(dir.file("in"), NamedTensors{{"query", query}, {"context", key}});
  EXPECT_EQ(error(1, "run weights --inputs in --output out --device cpu"), reason);
}

TEST_F(CliTest, ASecondContextIsAskedFor) {
  const auto file = data_path("layouts/wan_i2v.safetensors");
  auto inputs = load_tensors(data_path("layouts/wan_i2v.expect.safetensors"));
  for (const auto* name : {"ip_context", "output", "weights"}) inputs.erase(name);
  save_safetensors(dir.file("in"), inputs);
  const auto command = "run " + file + " --prefix blocks.0.attn2 --heads 2 --inputs in --output out --device cpu";
  EXPECT_EQ(error(1, command), "[inputs] in: must hold ip_context, for the second context of layer \"blocks.0.attn2.\"");
  EXPECT_EQ(xattn(command + " --allow-unexpected").status, 0);
}

TEST_F(CliTest, RunRefusesAQueryWithoutArithmetic) {
  save_safetensors(dir.file("weights"), *CrossAttention(4, 6, 6, 8));
  save_safetensors(dir.file("in"), NamedTensors{{"query", query.to(at::kFloat8_e4m3fn)}, {"context", key}});
  EXPECT_EQ(error(1, "run weights --inputs in --output out --device cpu"),
            "[inputs] in: query must have type float64, float32, bfloat16 or float16, but has float8_e4m3fn");
  for (const auto type : {at::kFloat8_e4m3fn, at::kInt}) {
    const auto type_name = std::string(c10::getDtypeNames(type).first);
    save_safetensors(dir.file("in"), NamedTensors{{"query", query}, {"context", key.to(type)}});
    const auto message = error(1, "run weights --inputs in --output out --device cpu");
    EXPECT_NE(message.find("key must be float32"), std::string::npos) << message;
    EXPECT_NE(message.find(type_name), std::string::npos) << message;
  }
  save_safetensors(dir.file("weights"), layer_and("key_linear.weight", torch::ones({8, 6}, at::kChar)));
  EXPECT_EQ(
      error(1, "run weights --inputs in --output out --device cpu"),
      "[load] weights: tensor \"a.key_linear.weight\" must have a floating point type, but has int8; quantized weights must "
      "first be dequantised in Python, and saved again");
}

TEST_F(CliTest, RunMultipliesFloat8WeightsByTheirScalesInTheTypeOfTheQuery) {
  auto tensors = layer_and("key_linear.weight_scale", torch::rand({8, 1}) + 0.5);
  const auto weight = tensors.at("a.key_linear.weight").detach().to(at::kFloat8_e4m3fn);
  tensors["a.key_linear.weight"] = weight;
  save_safetensors(dir.file("weights"), tensors);
  save_safetensors(dir.file("in"), NamedTensors{{"query", query.to(at::kDouble)}, {"context", key.to(at::kDouble)}});
  ASSERT_EQ(xattn("run weights --inputs in --output out --device cpu").status, 0);
  const auto output = load_tensors(dir.file("out")).at("output");

  const auto wide = weight.to(at::kDouble) * tensors.at("a.key_linear.weight_scale").to(at::kDouble);
  const auto get = [&](const std::string& name) { return tensors.at("a." + name).to(at::kDouble); };
  const auto linear = [&](const torch::Tensor& x, const std::string& name, const torch::Tensor& w) {
    return torch::linear(x.to(at::kDouble), w, get(name + ".bias"));
  };
  const torch::NoGradGuard no_grad;
  const auto q = linear(query, "query_linear", get("query_linear.weight")), k = linear(key, "key_linear", wide);
  const auto v = linear(key, "value_linear", get("value_linear.weight"));
  const auto p = torch::softmax(torch::matmul(q, k.transpose(1, 2)) / std::sqrt(8.), -1);
  const auto expected = linear(torch::matmul(p, v), "output_linear", get("output_linear.weight"));
  EXPECT_LE((output - expected).abs().max().item<double>(), 1e-13);

  ASSERT_EQ(xattn("convert weights new.safetensors --to mlx").status, 0);
  const auto converted = load_tensors(dir.file("new.safetensors"));
  EXPECT_EQ(converted.size(), tensors.size() - 1);
  EXPECT_TRUE(converted.at("a.key_proj.weight").equal(wide.to(at::kFloat)));
}

TEST_F(CliTest, ConvertRefusesALayoutThatComputesOtherwise) {
  const auto layouts = data_path("layouts/");
  EXPECT_NE(error(1, "convert " + layouts + "t5.safetensors x.safetensors --to reference")
                .find("; unexpected: relative_attention_bias.weight"),
            std::string::npos);
  auto t5 = load_tensors(layouts + "t5.safetensors");
  std::erase_if(t5, [](const auto& item) { return item.first.find("EncDecAttention") == std::string::npos; });
  save_safetensors(dir.file("t5"), t5);
  EXPECT_EQ(
      error(1, "convert t5 x.safetensors --to o_proj"),
      "[convert] t5: layer \"decoder.block.0.layer.1.EncDecAttention.\" has logits with scale 1, as layout t5 says, but layout "
      "o_proj says 1 / sqrt(head_dim)");
  EXPECT_EQ(xattn("convert t5 x.safetensors --to o_proj --allow-unexpected").status, 0);
  const auto mllama = error(1, "convert " + layouts + "mllama.safetensors x.safetensors --layout o_proj --to reference");
  EXPECT_NE(mllama.find("has norms with eps 1e-05, as layout o_proj says, but layout reference says 1e-06"), std::string::npos)
      << mllama;
  const auto flamingo = error(1, "convert " + layouts + "flamingo.safetensors x.safetensors --to reference");
  EXPECT_NE(flamingo.find("unexpected: norm.bias, norm.weight"), std::string::npos) << flamingo;
  const auto wan = error(1, "convert " + layouts + "wan_i2v_original.safetensors x.safetensors --to wan_diffusers");
  EXPECT_NE(wan.find("unexpected: k_img.bias, k_img.weight"), std::string::npos) << wan;
}

// ---- verify -----------------------------------------------------------------------------------------------------------------

TEST_F(CliTest, VerifyFindsTheLayerAndSaysHowFarItsOutputIs) {
  const auto fixture = data_path("layouts/bert");
  const auto result = xattn("verify " + fixture + ".safetensors --expect " + fixture + ".expect.safetensors --device cpu");
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_NE(result.out.find("\nequal within 1.0e-05 of the largest element\n"), std::string::npos) << result.out;
  EXPECT_TRUE(result.out.starts_with("output ")) << result.out;
}

TEST_F(CliTest, VerifyKnowsEveryFamilyWithoutItsLayoutBeingNamed) {
  for (const auto& entry : std::filesystem::directory_iterator(data_path("layouts"))) {
    const auto file = entry.path().string();
    if (!file.ends_with(".expect.safetensors") || file.ends_with(".block.expect.safetensors")) continue;
    const auto weights = file.substr(0, file.size() - std::string(".expect.safetensors").size()) + ".safetensors";
    const auto about = open_checkpoint(file).metadata();
    const auto layer = about.contains("base") ? data_path("layouts/" + about.at("base") + ".safetensors") + " --ip-adapter " +
                                                    weights + " --prefix " + about.at("base_prefix")
                                              : weights;
    const std::string positions = about.contains("positions") ? " --allow-unexpected" : "";  // they are in the inputs
    const auto result = xattn("verify " + layer + " --expect " + file + " --device cpu" + positions);
    EXPECT_EQ(result.status, 0) << result.out << result.err;
  }
}

TEST_F(CliTest, VerifyFailsForOtherWeights) {
  const auto attention = CrossAttention(4, 6, 6, 8);
  const torch::NoGradGuard no_grad;
  const auto output = std::get<0>(attention.ptr()->forward(query, key, value));
  save_safetensors(dir.file("weights"), *attention);
  save_safetensors(dir.file("good"), NamedTensors{{"query", query}, {"key", key}, {"value", value}, {"output", output}});
  save_safetensors(dir.file("bad"), NamedTensors{{"query", query}, {"key", key}, {"value", value}, {"output", output + 0.01}});
  EXPECT_EQ(xattn("verify weights --expect good --device cpu").status, 0);
  const auto result = xattn("verify weights --expect bad --device cpu");
  EXPECT_EQ(result.status, 1);
  EXPECT_NE(result.out.find("DIFFERENT"), std::string::npos) << result.out;
  EXPECT_EQ(result.err, "xattn: [verify] weights: does not give what bad holds, within 1.0e-05 of its largest element\n");
  EXPECT_EQ(xattn("verify weights --expect bad --device cpu --tolerance 0.1").status, 0);
}

TEST_F(CliTest, VerifyWantsAnOutputToCompareWith) {
  save_safetensors(dir.file("weights"), *CrossAttention(4, 6, 6, 8));
  save_safetensors(dir.file("in"), NamedTensors{{"query", query}, {"context", key}});
  EXPECT_EQ(error(1, "verify weights --expect in"), "[verify] in: must hold output");
  for (const std::string heads : {"1e300", "nan", "0"}) {
    save_safetensors(dir.file("in"), NamedTensors{{"query", query}, {"context", key}, {"output", query}},
                     {{"num_heads", heads}});
    EXPECT_EQ(error(1, "verify weights --expect in"), "[verify] in: metadata num_heads must be from 1 to 65536");
  }
}

// ---- convert ----------------------------------------------------------------------------------------------------------------

TEST_F(CliTest, ConvertGoesFromFormatToFormatAndBack) {
  const NamedTensors tensors = {{"a", torch::rand({2, 3})}, {"b.c", torch::tensor({1, 2}, torch::kByte)}};
  save_safetensors(dir.file("x.safetensors"), tensors, {{"step", "7"}});
  ASSERT_EQ(xattn("convert x.safetensors y.pt").status, 0);
  ASSERT_EQ(xattn("convert y.pt z.safetensors").status, 0);
  EXPECT_EQ(open_checkpoint(dir.file("y.pt")).format(), FileFormat::state_dict);
  const auto back = load_tensors(dir.file("z.safetensors"));
  ASSERT_EQ(back.size(), tensors.size());
  for (const auto& [name, tensor] : tensors) EXPECT_TRUE(torch::equal(back.at(name), tensor)) << name;
}

TEST_F(CliTest, ConvertRefusesToWriteTwoTensorsUnderOneName) {
  auto tensors = load_tensors(data_path("layouts/bert.safetensors"));
  ASSERT_EQ(xattn("convert " + data_path("layouts/bert.safetensors") + " y.safetensors --to reference").status, 0);
  const auto names = open_checkpoint(dir.file("y.safetensors")).tensors();
  const auto taken = std::ranges::find_if(names, [&](const auto& item) { return !tensors.contains(item.first); })->first;
  tensors[taken] = torch::ones({1});
  save_safetensors(dir.file("x.safetensors"), tensors);
  std::filesystem::remove(dir.file("y.safetensors"));
  error(1, "convert x.safetensors y.safetensors --to reference");  // fails: the layout does not explain one name
  const auto message = error(1, "convert x.safetensors y.safetensors --to reference --allow-unexpected");
  EXPECT_NE(message.find("would have two tensors \"" + taken + "\""), std::string::npos) << message;
  EXPECT_FALSE(std::filesystem::exists(dir.file("y.safetensors")));
}

TEST_F(CliTest, ConvertLeavesNothingBehindWhenItIsStopped) {
  std::string header;
  constexpr uint64_t kTensors = 200;
  constexpr uint64_t kBytes = uint64_t{1} << 25;  // 6.7 GB in all, sparse: no space on disk, and more than a moment to write
  for (uint64_t i = 0; i < kTensors; ++i) {
    header += (i == 0 ? "{\"t" : ",\"t") + std::to_string(i) + R"(":{"dtype":"U8","shape":[)" + std::to_string(kBytes) +
              R"(],"data_offsets":[)" + std::to_string(i * kBytes) + "," + std::to_string((i + 1) * kBytes) + "]}";
  }
  header += "}";
  const uint64_t length = header.size();
  test::write_bytes(dir.file("in.safetensors"), std::string(reinterpret_cast<const char*>(&length), 8) + header);
  std::filesystem::resize_file(dir.file("in.safetensors"), 8 + length + kTensors * kBytes);
  test::write_bytes(dir.file("out.safetensors"), "old");
  for (const auto& [signal, status] : {std::pair("INT", 130), {"TERM", 143}, {"HUP", 129}}) {
    const auto stopped = test::run_process(
        std::string("sh -c '" XATTN_CLI_PATH " convert in.safetensors out.safetensors & "
                    "until ls -A | grep -q \"[0-9a-f].tmp$\"; do kill -0 $! || break; sleep 0.01; done; kill -") +
            signal + " $!; wait $!'",
        dir);
    EXPECT_EQ(stopped.status, status) << signal << ": " << stopped.err;
    EXPECT_EQ(stopped.err, "xattn: stopped; out.safetensors was not written\n");
    std::set<std::string> files;
    for (const auto& entry : std::filesystem::directory_iterator(dir.path())) files.insert(entry.path().filename());
    EXPECT_EQ(files, (std::set<std::string>{".err", ".out", "in.safetensors", "out.safetensors"}));
    EXPECT_EQ(test::read_bytes(dir.file("out.safetensors")), "old");
  }
}

TEST_F(CliTest, OutputsThatCannotBeWrittenAreToldFirst) {
  EXPECT_EQ(error(1, "convert missing.safetensors no/y.safetensors"),
            "[output] no/y.safetensors: cannot be written: No such file or directory");
  EXPECT_EQ(error(1, "run missing --inputs missing --output no/y"),
            "[output] no/y: cannot be written: No such file or directory");
}

TEST_F(CliTest, ConvertSpellsLayersAnewAndKeepsTheRest) {
  const auto file = data_path("layouts/gpt2.safetensors");
  ASSERT_EQ(xattn("convert " + file + " reference.safetensors --to reference").status, 0);
  ASSERT_EQ(xattn("convert reference.safetensors back.safetensors --layout reference --to gpt2").status, 0);
  const auto before = load_tensors(file), reference = load_tensors(dir.file("reference.safetensors"));
  const auto after = load_tensors(dir.file("back.safetensors"));
  EXPECT_TRUE(reference.contains("transformer.h.0.crossattention.query_linear.weight"));
  EXPECT_FALSE(reference.contains("transformer.h.0.crossattention.q_attn.weight"));
  ASSERT_EQ(after.size(), before.size());
  for (const auto& [name, tensor] : before) EXPECT_TRUE(torch::equal(after.at(name), tensor)) << name;
}

TEST_F(CliTest, ConvertJoinsAShardedSetAndWritesOverNoneOfItsFiles) {
  const NamedTensors tensors = {{"a", torch::rand({2, 3})}, {"b.c", torch::tensor({1, 2}, torch::kByte)}};
  save_safetensors(dir.file("1.safetensors"), NamedTensors{*tensors.begin()});
  save_safetensors(dir.file("2.safetensors"), NamedTensors{*tensors.rbegin()});
  const json index = {{"metadata", {{"step", "7"}}}, {"weight_map", {{"a", "1.safetensors"}, {"b.c", "2.safetensors"}}}};
  test::write_bytes(dir.file("model.safetensors.index.json"), index.dump());
  for (const std::string name : {"whole.safetensors", "whole.bin"}) {
    ASSERT_EQ(xattn("convert model.safetensors.index.json " + name).status, 0);
    const auto whole = load_tensors(dir.file(name));
    ASSERT_EQ(whole.size(), tensors.size());
    for (const auto& [key, tensor] : tensors) EXPECT_TRUE(torch::equal(whole.at(key), tensor)) << key;
  }
  EXPECT_EQ(open_checkpoint(dir.file("whole.safetensors")).metadata().at("step"), "7");
  const auto index_file = dir.file("model.safetensors.index.json");
  std::filesystem::create_hard_link(index_file, dir.file("link.safetensors"));
  EXPECT_EQ(error(2, "convert model.safetensors.index.json link.safetensors"),
            "output: must not be an input, but is model.safetensors.index.json");
  EXPECT_EQ(test::read_bytes(index_file), index.dump());
  EXPECT_EQ(error(2, "convert model.safetensors.index.json 2.safetensors"),
            "output: must not be an input, but is 2.safetensors");
  EXPECT_TRUE(load_tensors(dir.file("2.safetensors")).contains("b.c"));
}

TEST_F(CliTest, ConvertRefusesToOverwriteItsInputAndLeavesNothingBehind) {
  save_safetensors(dir.file("y.safetensors"), NamedTensors{{"a", query}});
  EXPECT_EQ(error(2, "convert y.safetensors ./y.safetensors"), "output: must not be an input, but is y.safetensors");
  EXPECT_EQ(error(2, "convert y.safetensors z.onnx"), "OUT: must end in .safetensors, .pt, .pth or .bin, but is z.onnx");
  test::write_bytes(dir.file("broken"), test::read_bytes(dir.file("y.safetensors")).substr(0, 100));
  EXPECT_TRUE(error(1, "convert broken z.pt").starts_with("[safetensors] broken: "));
  EXPECT_FALSE(std::filesystem::exists(dir.file("z.pt")));
}

// ---- explain ----------------------------------------------------------------------------------------------------------------

TEST_F(CliTest, ExplainSaysWhatEveryOrderCostsAndWhy) {
  const auto text = xattn("explain 1,12,1,1500,768,768,768 --threads 1");
  EXPECT_EQ(text.status, 0) << text.err;
  EXPECT_NE(text.out.find("fold_into_query"), std::string::npos) << text.out;
  const auto json = nlohmann::json::parse(xattn("explain 1,12,1,1500,768,768,768 --qk-norm --threads 1 --json").out);
  EXPECT_EQ(json["chosen"]["logits"], "standard");
  EXPECT_EQ(json["chosen"]["values"], "fold_into_query");
  EXPECT_EQ(json["logits"].size(), 4);
  EXPECT_TRUE(json["logits"][0]["illegal"].is_null());
  EXPECT_EQ(json["logits"][1]["illegal"], "a norm of the key follows Wk");
  EXPECT_LT(json["chosen"]["operations"], json["standard"]["operations"]);
}

TEST_F(CliTest, ExplainNamesTheAttentionKernelAndWhy) {
  const auto explained = [this](const std::string& options) {
    return json::parse(xattn("explain 1,8,500,500,64,64,64 --threads 1 --json " + options).out);
  };
  const auto kernel = [&](const std::string& options) { return explained(options)["chosen"]["kernel"]; };
  const auto own = detail::modules_run_on() == RunsOn::module_kernels;
  EXPECT_EQ(kernel(""), own ? "heads" : "fused_cpu");
  EXPECT_EQ(kernel("--type bfloat16"), "fused_cpu");
  EXPECT_EQ(kernel("--cuda"), "scaled_dot_product_attention");
  EXPECT_EQ(kernel("--weights mean"), own ? "heads" : "tensor_operations");
  EXPECT_EQ(kernel("--weights per-head --training"), "tensor_operations");
  EXPECT_EQ(kernel("--dropout"), "tensor_operations");
  EXPECT_EQ(explained("--learned-bias")["chosen"]["reason"], "the mask's bias requires a gradient");
  EXPECT_EQ(explained("--learned-bias")["fused"], false);
  EXPECT_EQ(kernel("--frozen --weights mean"), "heads");
  EXPECT_EQ(explained("--frozen")["fused"], true);
  EXPECT_EQ(explained("--training")["standard"]["operations"], 3 * explained("")["standard"]["operations"].get<double>());
  const auto text = xattn("explain 1,12,1,1500,768,768,768 --frozen --weights mean").out;
  EXPECT_NE(text.find("attention by chain: "), std::string::npos) << text;
  EXPECT_TRUE(text.ends_with("; weights come from the same pass\n")) << text;
  EXPECT_EQ(error(2, "explain 1,8,500,500,64,64,64 --frozen --dropout"), "--frozen excludes --dropout");
}

TEST_F(CliTest, ExplainAnswersForEveryLayerOfTheBenchmark) {
  std::istringstream rows(test::read_bytes(XATTN_SOURCE_DIR "/src/bench/shapes.csv"));
  int count = 0;
  for (std::string row; std::getline(rows, row);) {
    if (row.empty() || row.front() == '#' || row.starts_with("name;")) continue;
    const auto name = row.substr(0, row.find(';'));
    const auto result = xattn("explain --frozen --threads 1 --shape '" + name + "'");
    EXPECT_EQ(result.status, 0) << name << ": " << result.err;
    ++count;
  }
  EXPECT_GT(count, 50);
  EXPECT_EQ(error(2, "explain"), "expected either sizes or --shape, but none came");
  EXPECT_EQ(error(2, "explain 1,3,1,1,8,8,8"), "SIZES: INNER_QK and INNER_V must be multiples of H, but are 8 and 8 for 3");
  EXPECT_NE(error(2, "explain --shape nothing").find("must name one row of reference example"), std::string::npos);
}

// ---- usage ------------------------------------------------------------------------------------------------------------------

TEST_F(CliTest, WrongUsageIsOneLineAndStatusTwo) {
  EXPECT_EQ(error(2, ""), "expected inspect, run, verify, convert or explain, but none came");
  EXPECT_EQ(error(2, "inspekt x"), "The following arguments were not expected: x inspekt");
  EXPECT_EQ(error(2, "inspect"), "FILE is required");
  EXPECT_EQ(error(2, "inspect x --jason"), "The following argument was not expected: --jason");
  EXPECT_EQ(error(2, "run x --inputs in"), "--output is required");
  EXPECT_EQ(error(2, "run x --inputs in --output out --heads 0"), "--heads: Value 0 not in range 1 to 65536");
  EXPECT_EQ(error(2, "run x --inputs in --output out --weights all"), "--weights: all not in {none,mean,per-head}");
}

TEST_F(CliTest, IsInTheProgramThatIsInstalled) {
  for (const auto& arguments :
       {std::string("--version"), "inspect " + data_path("reference.pt"), std::string("inspect missing")}) {
    const auto here = xattn(arguments), there = test::run_process(XATTN_CLI_PATH " " + arguments, dir);
    EXPECT_EQ(there.status, here.status) << arguments;
    EXPECT_EQ(there.out, here.out) << arguments;
    EXPECT_EQ(there.err, here.err) << arguments;
  }
}

TEST_F(CliTest, EveryHelpShowsAnExample) {
  for (const std::string command : {"", "inspect ", "run ", "verify ", "convert ", "explain "}) {
    const auto result = xattn(command + "--help");
    EXPECT_EQ(result.status, 0);
    EXPECT_NE(result.out.find("Example: xattn " + (command.empty() ? "inspect " : command)), std::string::npos) << result.out;
    EXPECT_EQ(result.err, "");
  }
}

TEST_F(CliTest, PrintsItsVersion) {
  const auto found = version();
  EXPECT_EQ(xattn("--version").out, "xattn " + found.xattn + " (" + found.commit + "), kernels " +
                                        std::string(name_of(detail::kernels().instruction_set)) + ", LibTorch " +
                                        found.libtorch + "\n");
}

}  // namespace
}  // namespace xattn
