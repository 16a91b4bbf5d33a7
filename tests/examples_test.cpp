// SPDX-License-Identifier: Apache-2.0

// The example programs as a user runs them. Their parts have tests of their own.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

#include "caption/commands.h"
#include "common/png.h"
#include "run_program.h"
#include "test_util.h"
#include "vqa/commands.h"

namespace xattn {
namespace {

class ExamplesTest : public testing::Test {
 protected:
  // Runs a program in the temporary directory; vqa and caption run in this process.
  test::ProgramResult run(const std::string& program, const std::string& arguments) const {
    const auto line = program + " " + arguments;
    if (line.starts_with("vqa ")) return test::run_here(vqa::run, line, dir.path());
    if (line.starts_with("caption ")) return test::run_here(caption::run, line, dir.path());
    return test::run_process(line, dir);
  }

  const test::TempDir dir;
};

TEST_F(ExamplesTest, ServeAnswersEveryRequestAsACallAloneAndRefusesBadOnes) {
  const auto result = run(XATTN_SERVE_PATH, "--requests 40 --keys 20 --batch 8");
  EXPECT_EQ(result.status, 0);
  EXPECT_EQ(result.err, "");
  int servers = 0;
  std::istringstream lines(result.out);
  for (std::string line; std::getline(lines, line);) {
    const auto differs = line.find("; differs by ");
    if (differs == std::string::npos) {
      EXPECT_EQ(line, "A bad request is refused: [serve] query must be float32 [Lq, 256], but is float32 [4, 257]");
      continue;
    }
    ++servers;
    EXPECT_GT(std::stod(line.substr(line.find(": ") + 2)), 0) << line;
    EXPECT_LT(std::stod(line.substr(differs + std::string("; differs by ").size())), 1e-5) << line;
  }
  EXPECT_EQ(servers, 4);  // one and two threads, one by one and in batches
  const auto wrong = run(XATTN_SERVE_PATH, "--batch 0");
  EXPECT_EQ(wrong.status, 2);
  EXPECT_EQ(wrong.err, "serve: --batch: Value 0 not in range 1 to 1000\n");
}

TEST_F(ExamplesTest, ReferencePrintsTheShapesOfTheReference) {
  const auto result = run(XATTN_REFERENCE_PATH, "--seed 1 --threads 1");
  EXPECT_EQ(result.status, 0);
  EXPECT_EQ(result.out, "Output shape: [2, 4, 512]\nAttention weights shape: [2, 4, 6]\n");
  EXPECT_EQ(result.err, "");
}

TEST_F(ExamplesTest, HelpShowsAnExample) {
  for (const std::string program : {XATTN_REFERENCE_PATH, "vqa", "vqa ask", "vqa train", "vqa evaluate", "vqa draw", "caption",
                                    "caption describe", "caption train", "caption evaluate"}) {
    const auto result = run(program, "--help");
    EXPECT_EQ(result.status, 0);
    EXPECT_NE(result.out.find("\nExample: "), std::string::npos) << program << "\n" << result.out;
  }
}

TEST_F(ExamplesTest, WrongUsageIsOneLineAndStatusTwo) {
  const auto refused = [this](const std::string& program, const std::string& arguments) {
    const auto result = run(program, arguments);
    EXPECT_EQ(result.status, 2) << arguments;
    EXPECT_EQ(result.out, "") << arguments;
    return result.err;
  };
  EXPECT_EQ(refused(XATTN_REFERENCE_PATH, "--device toaster"), "reference: --device: 'toaster' is not cpu, cuda or cuda:N\n");
  EXPECT_EQ(refused("vqa", "evaluate --threads 0"), "vqa: --threads: Value 0 not in range 1 to 1024\n");
  EXPECT_EQ(refused("vqa", ""), "vqa: A subcommand is required\n");
  EXPECT_EQ(refused("vqa", "train --text cnn"), "vqa: --text: cnn not in {rnn,transformer}\n");
  EXPECT_EQ(refused("vqa", "ask board.png question --picture ''"), "vqa: --picture: must not be empty\n");
  EXPECT_EQ(refused("vqa", "train --resume --steps 5"), "vqa: --resume excludes --steps\n");
  EXPECT_EQ(refused("caption", "describe"), "caption: BOARD.png is required\n");
}

TEST_F(ExamplesTest, AFailedJobIsOneLineAndStatusOne) {
  const auto failed = [this](const std::string& program, const std::string& arguments) {
    const auto result = run(program, arguments);
    EXPECT_EQ(result.status, 1) << arguments;
    EXPECT_EQ(std::ranges::count(result.err, '\n'), 1) << result.err;
    return result.err;
  };
  EXPECT_EQ(failed(XATTN_REFERENCE_PATH, "--device cuda:99").find("reference: there is no device cuda:99 here"), 0U);
  EXPECT_EQ(failed("vqa", "evaluate --digits missing.safetensors"),
            "vqa: [file] missing.safetensors: cannot be opened: No such file or directory\n");
  EXPECT_EQ(failed("vqa", "train --report missing/report.html"),
            "vqa: [output] missing/report.html: cannot be written: No such file or directory\n");
  EXPECT_EQ(failed("vqa", "train --output missing/x"),
            "vqa: [output] missing/x: cannot be written: No such file or directory\n");
  EXPECT_EQ(failed("caption", "train --output ."), "caption: [output] .: cannot be written: Is a directory\n");
  const std::string long_name(250, 'n');  // whose state's name is too long
  EXPECT_EQ(failed("caption", "train --output " + long_name),
            "caption: [output] " + long_name + ".training: cannot be written: File name too long\n");
  EXPECT_EQ(failed("vqa", "train --resume --output none.safetensors"),
            "vqa: [file] none.safetensors.training: cannot be opened: No such file or directory\n");
  test::write_bytes(dir.file("text.png"), "no picture");
  EXPECT_EQ(failed("vqa", "ask text.png 'is there a one'"), "vqa: cannot read text.png: Not a PNG file\n");
  ASSERT_EQ(run("vqa", "draw 7.3...1.. board.png").status, 0);
  EXPECT_EQ(failed("vqa", "ask board.png 'is there a seveen'"),
            "vqa: the word 'seveen' is not known; the nearest known words are seven, even, see\n");
  EXPECT_EQ(failed("vqa", "ask board.png '?'"), "vqa: the question has no words\n");
  EXPECT_EQ(failed("vqa", "ask board.png 'is there a one' --checkpoint " XATTN_EXAMPLE_DATA "/caption.safetensors"),
            "vqa: " XATTN_EXAMPLE_DATA
            "/caption.safetensors: must be a checkpoint of vqa, but is one of caption; `vqa train` "
            "writes one\n");
  EXPECT_EQ(failed("vqa", "draw 7.3 board.png"),
            "vqa: a board is written as nine cells, row by row, each a digit or '.', as in 7.3...1.., not as '7.3'\n");
}

TEST_F(ExamplesTest, VqaAnswersAQuestionAboutAPictureAndDrawsWhereItLooked) {
  ASSERT_EQ(run("vqa", "draw 7.3...1.. board.png --seed 3").status, 0);
  const auto result = run("vqa", "ask board.png 'What is in the top right?' --picture answer.png --device cpu");
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_EQ(result.out.find("three ("), 0U) << result.out;
  EXPECT_NE(result.out.find("Where it looked is drawn in answer.png."), std::string::npos) << result.out;
  const auto picture = examples::read_png(dir.file("answer.png"));
  EXPECT_GT(picture.size(0), 288);  // at least the board
}

TEST_F(ExamplesTest, CaptionDescribesAPictureAndDrawsWhereItLooked) {
  ASSERT_EQ(run("vqa", "draw 7.3...1.. board.png --seed 3").status, 0);
  for (const std::string beams : {"1", "5"}) {
    const auto result = run("caption", "describe board.png --picture words.png --device cpu --beams " + beams);
    EXPECT_EQ(result.status, 0) << result.err;
    for (const auto* digit : {"a seven", "a three", "a one"}) {
      EXPECT_NE(result.out.find(digit), std::string::npos) << result.out;
    }
  }
  EXPECT_GT(examples::read_png(dir.file("words.png")).size(0), 288);
}

TEST_F(ExamplesTest, EvaluateJsonIsOneObject) {
  const auto vqa = run("vqa", "evaluate --json --boards 100 --device cpu");
  EXPECT_EQ(vqa.status, 0) << vqa.err;
  const auto answers = nlohmann::json::parse(vqa.out);
  EXPECT_GT(answers.at("accuracy").get<double>(), 0.9);
  EXPECT_EQ(answers.at("kinds").size(), 7u);
  EXPECT_EQ(answers.at("kinds").at("place").at("questions").get<int>(), 200);
  const auto caption = run("caption", "evaluate --json --boards 100 --device cpu");
  EXPECT_EQ(caption.status, 0) << caption.err;
  const auto captions = nlohmann::json::parse(caption.out);
  EXPECT_GT(captions.at("exact_match").get<double>(), 0.85);
  EXPECT_GT(captions.at("recogniser").get<double>(), 0.85);
  EXPECT_EQ(captions.at("boards").get<int>(), 100);
}

// Ctrl-C, once the first steps are reported. ($! is the training; if it ends earlier, nothing waits.)
constexpr auto kInterrupted =
    R"(sh -c '"$0" "$@" & until grep -q "^step" .out; do kill -0 $! || break; sleep 0.05; done; kill -INT $!; wait $!' )";

TEST_F(ExamplesTest, AnInterruptedTrainingGoesOnToTheSameResult) {
  for (const std::string program : {XATTN_VQA_PATH, XATTN_CAPTION_PATH}) {
    const auto options = std::string(" train --device cpu --threads 1 --seed 5 --boards 5 ");
    const auto whole = run(program, options + "--steps 60 --output whole.safetensors");
    ASSERT_EQ(whole.status, 0) << whole.err;
    EXPECT_NE(whole.out.find("step 60/60  loss "), std::string::npos) << whole.out;
    auto parts = run(kInterrupted + program, options + "--steps 60 --output parts.safetensors");
    ASSERT_EQ(parts.status, 130) << "it was done before it could be interrupted, or could not: " << parts.err;
    EXPECT_NE(parts.err.find("and saved in parts.safetensors.training; go on with: "), std::string::npos) << parts.err;
    EXPECT_NE(parts.err.find(" train --resume --output parts.safetensors\n"), std::string::npos) << parts.err;
    EXPECT_FALSE(std::filesystem::exists(dir.file("parts.safetensors")));
    parts = run(program, " train --device cpu --threads 1 --boards 5 --resume --output parts.safetensors");
    ASSERT_EQ(parts.status, 0) << parts.err;
    EXPECT_EQ(test::read_bytes(dir.file("parts.safetensors")), test::read_bytes(dir.file("whole.safetensors")));
    EXPECT_FALSE(std::filesystem::exists(dir.file("parts.safetensors.training")));
    std::filesystem::remove(dir.file("parts.safetensors"));
  }
}

TEST_F(ExamplesTest, TrainAsksWhatToDoWithATrainingThatWasStopped) {
  for (const std::string program : {"vqa", "caption"}) {
    test::write_bytes(dir.file("x.training"), "a state");
    const auto train = program + " train --device cpu --boards 5 --steps 2 --output x";
    const auto asked = test::run_here(program == "vqa" ? vqa::run : caption::run, train, dir.path());
    EXPECT_EQ(asked.status, 2);
    EXPECT_EQ(asked.err, program +
                             ": x.training holds a training that was stopped; continue it with --resume, or start again with "
                             "--restart\n");
    EXPECT_EQ(test::read_bytes(dir.file("x.training")), "a state");
    const auto resumed = run(program, "train --device cpu --resume --output x");
    EXPECT_EQ(resumed.status, 1) << "this is no state: " << resumed.err;
    const auto anew = run(program, train.substr(program.size() + 1) + " --restart");
    EXPECT_EQ(anew.status, 0) << anew.err;
    EXPECT_FALSE(std::filesystem::exists(dir.file("x.training")));
    EXPECT_EQ(run(program, "train --resume --restart").status, 2);
    std::filesystem::remove(dir.file("x"));
  }
}

TEST_F(ExamplesTest, NoFileIsWaitedFor) {
  ASSERT_EQ(mkfifo(dir.file("pipe").c_str(), 0600), 0);
  ASSERT_EQ(run("vqa", "draw 7.3...1.. board.png").status, 0);
  for (const std::string arguments : {"vqa ask pipe what", "vqa evaluate --checkpoint pipe", "vqa evaluate --digits pipe",
                                      "vqa train --grammar pipe", "vqa train --image-encoder pipe", "caption describe pipe",
                                      "caption train --grammar pipe", "caption evaluate --checkpoint pipe"}) {
    const auto space = arguments.find(' ');
    const auto result = run(arguments.substr(0, space), arguments.substr(space + 1));
    EXPECT_EQ(result.status, 1) << arguments;
    EXPECT_NE(result.err.find(": [file] pipe: must be a regular file, but is not\n"), std::string::npos) << result.err;
  }
}

TEST_F(ExamplesTest, OutputThatIsLostIsAFailure) {
  for (const std::string program : {XATTN_VQA_PATH, XATTN_CAPTION_PATH, XATTN_REFERENCE_PATH}) {
    const auto result = test::run_process("sh -c '" + program + " --help > /dev/full'", dir);
    EXPECT_EQ(result.status, 1);
    EXPECT_TRUE(result.err.ends_with(": standard output cannot be written: No space left on device\n")) << result.err;
  }
}

TEST_F(ExamplesTest, ReportsAreWritten) {
  for (const std::string program : {"vqa", "caption"}) {
    const auto result = run(program, "evaluate --boards 50 --device cpu --report report.html");
    EXPECT_EQ(result.status, 0) << result.err;
    EXPECT_EQ(test::read_bytes(dir.file("report.html")).find("<!DOCTYPE html>"), 0u);
    std::filesystem::remove(dir.file("report.html"));
  }
}

}  // namespace
}  // namespace xattn
