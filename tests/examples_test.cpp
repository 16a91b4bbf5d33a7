// SPDX-License-Identifier: Apache-2.0

// The example programs as a user runs them. Their parts have tests of their own.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdlib>
#include <filesystem>
#include <string>

#include "test_util.h"

namespace xattn {
namespace {

struct Result {
  int status;
  std::string out;
  std::string err;
};

class ExamplesTest : public testing::Test {
 protected:
  // Runs a program in the temporary directory.
  Result run(const std::string& program, const std::string& arguments) const {
    const auto command = "cd " + dir.path() + " && " + program + " " + arguments + " > .out 2> .err";
    const int status = std::system(command.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, test::read_bytes(dir.file(".out")),
            test::read_bytes(dir.file(".err"))};
  }

  const test::TempDir dir;
};

TEST_F(ExamplesTest, ReferencePrintsTheShapesOfTheReference) {
  const auto result = run(XATTN_REFERENCE_PATH, "--seed 1 --threads 1");
  EXPECT_EQ(result.status, 0);
  EXPECT_EQ(result.out, "Output shape: [2, 4, 512]\nAttention weights shape: [2, 4, 6]\n");
  EXPECT_EQ(result.err, "");
}

TEST_F(ExamplesTest, HelpShowsAnExample) {
  for (const std::string program : {XATTN_REFERENCE_PATH, XATTN_VQA_PATH}) {
    const auto result = run(program, "--help");
    EXPECT_EQ(result.status, 0);
    EXPECT_NE(result.out.find("\nExample: "), std::string::npos) << result.out;
  }
}

TEST_F(ExamplesTest, WrongUsageIsOneLineAndStatusTwo) {
  const auto device = run(XATTN_REFERENCE_PATH, "--device toaster");
  EXPECT_EQ(device.status, 2);
  EXPECT_EQ(device.err, "reference: --device: 'toaster' is not cpu, cuda or cuda:N\n");

  const auto threads = run(XATTN_VQA_PATH, "--threads 0");
  EXPECT_EQ(threads.status, 2);
  EXPECT_EQ(threads.err, "vqa: --threads: Value 0 not in range 1 to 1024\n");
}

TEST_F(ExamplesTest, AFailedJobIsOneLineAndStatusOne) {
  const auto device = run(XATTN_REFERENCE_PATH, "--device cuda:99");
  EXPECT_EQ(device.status, 1);
  EXPECT_EQ(device.err.find("reference: there is no device cuda:99 here"), 0U) << device.err;

  const auto digits = run(XATTN_VQA_PATH, "--digits missing.safetensors");
  EXPECT_EQ(digits.status, 1);
  EXPECT_EQ(digits.err, "vqa: there is no file missing.safetensors; say where the digits are with --digits FILE\n");

  const auto picture = run(XATTN_VQA_PATH, "--picture missing/answers.png");
  EXPECT_EQ(picture.status, 1);
  EXPECT_EQ(picture.err, "vqa: there is no folder missing for the picture; choose another with --picture FILE\n");
}

TEST_F(ExamplesTest, VqaFailsWhenItsAnswersAreBad) {
  const auto result = run(XATTN_VQA_PATH, "--steps 10 --device cpu");
  EXPECT_EQ(result.status, 1);
  EXPECT_NE(result.out.find("step 10/10"), std::string::npos) << result.out;
  EXPECT_NE(result.err.find("at least 95 % and 80 % are wanted\n"), std::string::npos) << result.err;
  EXPECT_TRUE(std::filesystem::exists(dir.file("vqa.png")));
}

}  // namespace
}  // namespace xattn
